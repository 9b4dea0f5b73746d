// Spectra of many matrices of at most 128 rows: a block rotates one of them in shared memory.
//
// Symmetric matrices by two-sided Jacobi rotations, singular values by one-sided ones (Hestenes);
// Golub & Van Loan 2013, 8.5 and 8.6. Each step of a sweep rotates n/2 pairs that have no index in
// common, in the order of a round-robin tournament. A nearly diagonal matrix needs few sweeps, since
// convergence is quadratic. Every sum has a fixed order that does not depend on the number of
// threads, and so has the result. Vectors that do not fit beside the matrix are rotated in `work`,
// in global memory, which the L2 cache holds: `kept` says where.

constexpr int NOWHERE = 0;  // values only: the pointers to vectors are not used
constexpr int SHARED = 1;

template <typename T>
struct Float;

template <>
struct Float<double> {
    static constexpr double EPS = 2.220446049250313e-16;
    static constexpr int LARGEST = 1000;     // exponents that can be taken off
    static constexpr double LEAST = 1e-290;  // of a sum of squares that underflow did not round
};

template <>
struct Float<float> {
    static constexpr float EPS = 1.1920929e-7f;
    static constexpr int LARGEST = 120;
    static constexpr float LEAST = 1e-30f;
};

__device__ __forceinline__ float root(float x) { return sqrtf(x); }
__device__ __forceinline__ double root(double x) { return sqrt(x); }
__device__ __forceinline__ float size(float x) { return fabsf(x); }
__device__ __forceinline__ double size(double x) { return fabs(x); }

// Pair k of step s among m players, m even: the last one stays, the others go round.
__device__ __forceinline__ void pair(int k, int s, int m, int *p, int *q) {
    const int a = k ? (s + k) % (m - 1) : s;
    const int b = k ? (s + m - 1 - k) % (m - 1) : m - 1;
    *p = min(a, b);
    *q = max(a, b);
}

// The rotation that makes c of [[a, c], [c, b]] zero: cosine, sine and tangent.
template <typename T>
__device__ __forceinline__ void rotation(T a, T b, T c, T *cosine, T *sine, T *tangent) {
    const T half = (b - a) / (2 * c);
    // Beyond this the square would overflow, and the tangent is 1 / (2 half).
    const T far = size(half) > 1 / Float<T>::EPS ? 2 * size(half)
                                                 : size(half) + root(1 + half * half);
    *tangent = (half < 0 ? -1 : 1) / far;
    *cosine = 1 / root(1 + *tangent * *tangent);
    *sine = *tangent * *cosine;
}

// Rotate the pairs of step s among `m` rows of v, which are `length` long and `lead` apart.
template <typename T>
__device__ void turn(T *v, int lead, int length, const T *rotations, int s, int m) {
    for (int e = threadIdx.x; e < m / 2 * length; e += blockDim.x) {
        const int k = e / length, i = e % length;
        int p, q;
        pair(k, s, m, &p, &q);
        const T c = rotations[2 * k], d = rotations[2 * k + 1];
        if (d == 0) continue;
        const T x = v[p * lead + i], y = v[q * lead + i];
        v[p * lead + i] = c * x - d * y;
        v[q * lead + i] = d * x + c * y;
    }
}

// Divide n rows by the power of two that brings the largest of their elements to between 1/2 and 1;
// returns its exponent. `largest` has room for one number a row.
template <typename T>
__device__ int rescale(T *rows, int lead, int n, int length, T *largest) {
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        largest[i] = 0;
        for (int j = 0; j < length; ++j)
            if (size(rows[i * lead + j]) > largest[i]) largest[i] = size(rows[i * lead + j]);
    }
    __syncthreads();
    T most = 0;
    for (int i = 0; i < n; ++i)
        if (largest[i] > most) most = largest[i];
    int e = 0;
    if (most > 0) frexp(most, &e);
    e = max(-Float<T>::LARGEST, min(Float<T>::LARGEST, e));
    for (int k = threadIdx.x; k < n * length; k += blockDim.x) {
        T *x = rows + k / length * lead + k % length;
        *x = ldexp(*x, -e);
    }
    __syncthreads();
    return e;
}

// place[r] is the index of the number that comes r-th in order, ties by index.
template <typename T>
__device__ void sort(const T *values, int step, int n, bool descending, int *place) {
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        int rank = 0;
        const T mine = values[i * step];
        for (int j = 0; j < n; ++j) {
            const T other = values[j * step];
            rank += descending ? other > mine || (other == mine && j < i)
                               : other < mine || (other == mine && j < i);
        }
        place[rank] = i;
    }
}

// Shared memory, in T: a (m, m + 1), m = n or n + 1 even; v (n, n) if kept there; rotations (m);
// sums (2 n), result (2). Behind it: int place (n).
template <typename T>
__device__ void eigh(const T *matrices, T *values, T *vectors, T *work, int *info, int n,
                     int kept, int sweeps, unsigned char *memory) {
    const int m = n + (n & 1), pairs = m / 2, lead = m + 1, t = threadIdx.x, threads = blockDim.x;
    const long long at = blockIdx.x, square = static_cast<long long>(n) * n;
    T *a = reinterpret_cast<T *>(memory), *v = a + m * lead;
    T *rotations = v + (kept == SHARED ? n * n : 0), *sums = rotations + m, *result = sums + 2 * n;
    int *place = reinterpret_cast<int *>(result + 2);
    if (kept != SHARED) v = work + at * square;

    // The lower triangle, and for odd n a row and a column of zeros, which are never rotated.
    const T *matrix = matrices + at * square;
    for (int e = t; e < m * m; e += threads) {
        const int i = e / m, j = e % m, row = max(i, j), column = min(i, j);
        a[i * lead + j] = row < n ? matrix[row * n + column] : 0;
    }
    if (kept != NOWHERE)
        for (int e = t; e < n * n; e += threads) v[e] = e / n == e % n;
    __syncthreads();
    const int scale = rescale(a, lead, n, n, sums);

    int done = 0;
    for (;; ++done) {
        for (int i = t; i < n; i += threads) {
            T off = 0;
            for (int j = 0; j < n; ++j)
                if (j != i) off += a[i * lead + j] * a[i * lead + j];
            sums[2 * i] = off;
            sums[2 * i + 1] = off + a[i * lead + i] * a[i * lead + i];
        }
        __syncthreads();
        if (t == 0) {
            result[0] = result[1] = 0;
            for (int i = 0; i < n; ++i) {
                result[0] += sums[2 * i];
                result[1] += sums[2 * i + 1];
            }
        }
        __syncthreads();
        // By Weyl no eigenvalue is then off by more than EPS of the Frobenius norm.
        if (result[0] <= Float<T>::EPS * Float<T>::EPS * result[1] || done == sweeps) break;
        for (int s = 0; s < m - 1; ++s) {
            for (int k = t; k < pairs; k += threads) {
                int p, q;
                pair(k, s, m, &p, &q);
                T cosine = 1, sine = 0, tangent = 0;
                const T c = a[p * lead + q];
                if (c != 0)
                    rotation(a[p * lead + p], a[q * lead + q], c, &cosine, &sine, &tangent);
                rotations[2 * k] = cosine;
                rotations[2 * k + 1] = sine;
            }
            __syncthreads();
            // What pairs k and l make of the 2 x 2 elements where they cross, k >= l, and of the
            // same ones on the other side of the diagonal: no other thread has to do with these.
            for (int e = t; e < pairs * (pairs + 1) / 2; e += threads) {
                int k = static_cast<int>((sqrtf(8.0f * e + 1) - 1) / 2);
                k += (k + 1) * (k + 2) / 2 <= e;
                k -= k * (k + 1) / 2 > e;
                const int l = e - k * (k + 1) / 2;
                int p, q, u, w;
                pair(k, s, m, &p, &q);
                const T c = rotations[2 * k], d = rotations[2 * k + 1];
                if (k == l) {
                    const T x = a[p * lead + q];
                    a[p * lead + p] -= d / c * x;
                    a[q * lead + q] += d / c * x;
                    a[p * lead + q] = a[q * lead + p] = 0;
                    continue;
                }
                pair(l, s, m, &u, &w);
                const T f = rotations[2 * l], g = rotations[2 * l + 1];
                const T pu = a[p * lead + u], pw = a[p * lead + w];
                const T qu = a[q * lead + u], qw = a[q * lead + w];
                const T left_p = f * pu - g * pw, right_p = g * pu + f * pw;
                const T left_q = f * qu - g * qw, right_q = g * qu + f * qw;
                a[p * lead + u] = a[u * lead + p] = c * left_p - d * left_q;
                a[p * lead + w] = a[w * lead + p] = c * right_p - d * right_q;
                a[q * lead + u] = a[u * lead + q] = d * left_p + c * left_q;
                a[q * lead + w] = a[w * lead + q] = d * right_p + c * right_q;
            }
            if (kept != NOWHERE) turn(v, n, n, rotations, s, m);
            __syncthreads();
        }
    }

    const bool converged = result[0] <= Float<T>::EPS * Float<T>::EPS * result[1];
    if (t == 0) info[at] = converged ? done : -1;
    for (int i = t; i < n; i += threads) place[i] = i;
    __syncthreads();
    if (converged) sort(a, lead + 1, n, false, place);  // numbers that are NaN have no order
    __syncthreads();
    for (int i = t; i < n; i += threads)
        values[at * n + i] = ldexp(a[place[i] * (lead + 1)], scale);
    if (kept != NOWHERE)
        for (int e = t; e < n * n; e += threads)
            vectors[at * square + e] = v[place[e % n] * n + e / n];
}

// Shared memory, in T: w (n, rows), its columns, with an odd lead; v (n, n) if kept there; sums
// (pairs, 8, 3), of 8 threads a pair; rotations (pairs, 2); turned (pairs). Behind it: int place (n).
template <typename T>
__device__ void svd(const T *matrices, T *left, T *values, T *right, T *work, int *info, int rows,
                    int n, int kept, int sweeps, unsigned char *memory) {
    const int m = n + (n & 1), pairs = m / 2, lead = rows | 1, t = threadIdx.x;
    const int threads = blockDim.x;
    const long long at = blockIdx.x, square = static_cast<long long>(n) * n;
    T *w = reinterpret_cast<T *>(memory), *v = w + n * lead;
    T *sums = v + (kept == SHARED ? n * n : 0), *rotations = sums + 24 * pairs, *turned = rotations + m;
    int *place = reinterpret_cast<int *>(turned + pairs);
    if (kept != SHARED) v = work + at * square;

    const T *matrix = matrices + at * rows * n;
    for (int e = t; e < rows * n; e += threads) w[e % n * lead + e / n] = matrix[e];
    if (kept != NOWHERE)
        for (int e = t; e < n * n; e += threads) v[e] = e / n == e % n;
    __syncthreads();
    const int scale = rescale(w, lead, n, rows, sums);

    // Columns are orthogonal when their cosine is no more than the rounding of a sum of `rows`.
    const T close = root(static_cast<T>(rows)) * Float<T>::EPS;
    bool converged = false;
    int done = 0;
    for (; !converged && done < sweeps; ++done) {
        for (int k = t; k < pairs; k += threads) turned[k] = 0;
        for (int s = 0; s < m - 1; ++s) {
            for (int e = t; e < 8 * pairs; e += threads) {
                int p, q;
                pair(e / 8, s, m, &p, &q);
                T x = 0, y = 0, z = 0;
                for (int i = e % 8; q < n && i < rows; i += 8) {
                    const T b = w[p * lead + i], c = w[q * lead + i];
                    x += b * b;
                    y += c * c;
                    z += b * c;
                }
                sums[3 * e] = x;
                sums[3 * e + 1] = y;
                sums[3 * e + 2] = z;
            }
            __syncthreads();
            for (int k = t; k < pairs; k += threads) {
                T x = 0, y = 0, z = 0;
                for (int e = 8 * k; e < 8 * k + 8; ++e) {
                    x += sums[3 * e];
                    y += sums[3 * e + 1];
                    z += sums[3 * e + 2];
                }
                T cosine = 1, sine = 0, tangent = 0;
                // A column too short for a cosine is below the rounding of the rest.
                const bool skip = x < Float<T>::LEAST || y < Float<T>::LEAST;
                // Negated, so that NaN goes on to the last sweep and is told.
                if (!(skip || size(z) <= close * root(x) * root(y))) {
                    rotation(x, y, z, &cosine, &sine, &tangent);
                    turned[k] = 1;
                }
                rotations[2 * k] = cosine;
                rotations[2 * k + 1] = sine;
            }
            __syncthreads();
            turn(w, lead, rows, rotations, s, m);
            if (kept != NOWHERE) turn(v, n, n, rotations, s, m);
            __syncthreads();
        }
        converged = true;
        for (int k = 0; k < pairs; ++k) converged = converged && turned[k] == 0;
        __syncthreads();
    }

    if (t == 0) info[at] = converged ? done : -1;
    T *norms = sums;
    for (int j = t; j < n; j += threads) {
        T x = 0;
        for (int i = 0; i < rows; ++i) x += w[j * lead + i] * w[j * lead + i];
        norms[j] = root(x);
        place[j] = j;
    }
    __syncthreads();
    if (converged) sort(norms, 1, n, true, place);
    __syncthreads();
    for (int j = t; j < n; j += threads) values[at * n + j] = ldexp(norms[place[j]], scale);
    if (kept == NOWHERE) return;
    for (int e = t; e < rows * n; e += threads) {
        const int j = place[e % n];
        left[at * rows * n + e] =
            norms[j] * norms[j] < Float<T>::LEAST ? 0 : w[j * lead + e / n] / norms[j];
    }
    for (int e = t; e < n * n; e += threads) right[at * square + e] = v[place[e / n] * n + e % n];
}

extern "C" __global__ void __launch_bounds__(512, 2)
    jacobi_eigh_f64(const double *a, double *w, double *v, double *work, int *info, int n, int
                    kept, int sweeps) {
    extern __shared__ __align__(16) unsigned char memory[];
    eigh(a, w, v, work, info, n, kept, sweeps, memory);
}

extern "C" __global__ void __launch_bounds__(512, 2)
    jacobi_eigh_f32(const float *a, float *w, float *v, float *work, int *info, int n, int kept,
                    int sweeps) {
    extern __shared__ __align__(16) unsigned char memory[];
    eigh(a, w, v, work, info, n, kept, sweeps, memory);
}

extern "C" __global__ void __launch_bounds__(512, 2)
    jacobi_svd_f64(const double *a, double *u, double *s, double *vh, double *work, int *info,
                   int rows, int n, int kept, int sweeps) {
    extern __shared__ __align__(16) unsigned char memory[];
    svd(a, u, s, vh, work, info, rows, n, kept, sweeps, memory);
}

extern "C" __global__ void __launch_bounds__(512, 2)
    jacobi_svd_f32(const float *a, float *u, float *s, float *vh, float *work, int *info, int
                   rows, int n, int kept, int sweeps) {
    extern __shared__ __align__(16) unsigned char memory[];
    svd(a, u, s, vh, work, info, rows, n, kept, sweeps, memory);
}
