// Eigenproblems and SVDs of many matrices of at most 128 rows: each block rotates one matrix in
// shared memory.
//
// Eigenproblems use two-sided Jacobi rotations, SVDs one-sided ones (Hestenes); Golub & Van Loan
// 2013, 8.5 and 8.6. Each step of a sweep rotates n/2 disjoint pairs of indices, in the order of a
// round-robin tournament. Convergence is quadratic, so a nearly diagonal matrix needs few sweeps.
// Every sum has a fixed order that does not depend on the number of threads, so neither does the
// result. Vectors that do not fit into shared memory with the matrix are rotated in `work`, in
// global memory, which the L2 cache holds; `placement` selects where.

constexpr int NOWHERE = 0;  // values only: the pointers to vectors are not used
constexpr int SHARED = 1;

template <typename T>
struct Float;

template <>
struct Float<double> {
    static constexpr double EPS = 2.220446049250313e-16;
    static constexpr int MAX_EXPONENT = 1000;    // of the powers of two that rows are scaled by
    static constexpr double MIN_NORM2 = 1e-290;  // below it underflow may round a sum of squares
};

template <>
struct Float<float> {
    static constexpr float EPS = 1.1920929e-7f;
    static constexpr int MAX_EXPONENT = 120;
    static constexpr float MIN_NORM2 = 1e-30f;
};

__device__ __forceinline__ float root(float x) { return sqrtf(x); }
__device__ __forceinline__ double root(double x) { return sqrt(x); }
__device__ __forceinline__ float size(float x) { return fabsf(x); }
__device__ __forceinline__ double size(double x) { return fabs(x); }

// Pair k in step s of a round-robin tournament of m players, m even: the last player stays, and the
// others rotate.
__device__ __forceinline__ void pair(int k, int s, int m, int *p, int *q) {
    const int a = k ? (s + k) % (m - 1) : s;
    const int b = k ? (s + m - 1 - k) % (m - 1) : m - 1;
    *p = min(a, b);
    *q = max(a, b);
}

// The rotation that diagonalises [[a, c], [c, b]]: cosine, sine and tangent.
template <typename T>
__device__ __forceinline__ void rotation(T a, T b, T c, T *cosine, T *sine, T *tangent) {
    const T half = (b - a) / (2 * c);
    // Above 1 / EPS the square could overflow, and the tangent is 1 / (2 half) to rounding.
    const T cotangent = size(half) > 1 / Float<T>::EPS ? 2 * size(half)
                                                       : size(half) + root(1 + half * half);
    *tangent = (half < 0 ? -1 : 1) / cotangent;
    *cosine = 1 / root(1 + *tangent * *tangent);
    *sine = *tangent * *cosine;
}

// Rotate the pairs of step s among the m rows of v, of `length` elements at a stride of `lead`.
template <typename T>
__device__ void rotate_pairs(T *v, int lead, int length, const T *rotations, int s, int m) {
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

// Divide n rows by the power of two that brings their largest element to between 1/2 and 1, and
// return its exponent. `largest` is scratch for one number per row.
template <typename T>
__device__ int rescale(T *rows, int lead, int n, int length, T *largest) {
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        largest[i] = 0;
        for (int j = 0; j < length; ++j)
            if (size(rows[i * lead + j]) > largest[i]) largest[i] = size(rows[i * lead + j]);
    }
    __syncthreads();
    T maximum = 0;
    for (int i = 0; i < n; ++i)
        if (largest[i] > maximum) maximum = largest[i];
    int e = 0;
    if (maximum > 0) frexp(maximum, &e);
    e = max(-Float<T>::MAX_EXPONENT, min(Float<T>::MAX_EXPONENT, e));
    for (int k = threadIdx.x; k < n * length; k += blockDim.x) {
        T *x = rows + k / length * lead + k % length;
        *x = ldexp(*x, -e);
    }
    __syncthreads();
    return e;
}

// Set order[r] to the index of the r-th smallest (or largest) number; ties are ordered by index.
template <typename T>
__device__ void sort(const T *values, int step, int n, bool descending, int *order) {
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        int rank = 0;
        const T value = values[i * step];
        for (int j = 0; j < n; ++j) {
            const T other = values[j * step];
            rank += descending ? other > value || (other == value && j < i)
                               : other < value || (other == value && j < i);
        }
        order[rank] = i;
    }
}

// Shared memory, in T: a (m, m + 1), m = n rounded up to even; v (n, n) if placed in shared memory;
// rotations (m); sums (2 n), result (2). Then int order (n).
template <typename T>
__device__ void eigh(const T *matrices, T *values, T *vectors, T *work, int *info, int n,
                     int placement, int sweeps, unsigned char *memory) {
    const int m = n + (n & 1), pairs = m / 2, lead = m + 1, t = threadIdx.x, threads = blockDim.x;
    const long long at = blockIdx.x, square = static_cast<long long>(n) * n;
    T *a = reinterpret_cast<T *>(memory), *v = a + m * lead;
    T *rotations = v + (placement == SHARED ? n * n : 0), *sums = rotations + m;
    T *result = sums + 2 * n;
    int *order = reinterpret_cast<int *>(result + 2);
    if (placement != SHARED) v = work + at * square;

    // Read the lower triangle. For odd n add a row and a column of zeros, which are never rotated.
    const T *matrix = matrices + at * square;
    for (int e = t; e < m * m; e += threads) {
        const int i = e / m, j = e % m, row = max(i, j), column = min(i, j);
        a[i * lead + j] = row < n ? matrix[row * n + column] : 0;
    }
    if (placement != NOWHERE)
        for (int e = t; e < n * n; e += threads) v[e] = e / n == e % n;
    __syncthreads();
    const int scale = rescale(a, lead, n, n, sums);

    int sweep = 0;
    for (;; ++sweep) {
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
        // By Weyl's inequality no eigenvalue is then off by more than EPS of the Frobenius norm.
        if (result[0] <= Float<T>::EPS * Float<T>::EPS * result[1] || sweep == sweeps) break;
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
            // Pairs k and l <= k rotate the 2 x 2 elements at which they cross, and their mirror
            // images across the diagonal. No other thread touches these elements.
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
            if (placement != NOWHERE) rotate_pairs(v, n, n, rotations, s, m);
            __syncthreads();
        }
    }

    const bool converged = result[0] <= Float<T>::EPS * Float<T>::EPS * result[1];
    if (t == 0) info[at] = converged ? sweep : -1;
    for (int i = t; i < n; i += threads) order[i] = i;
    __syncthreads();
    if (converged) sort(a, lead + 1, n, false, order);  // NaN can't be sorted
    __syncthreads();
    for (int i = t; i < n; i += threads)
        values[at * n + i] = ldexp(a[order[i] * (lead + 1)], scale);
    if (placement != NOWHERE)
        for (int e = t; e < n * n; e += threads)
            vectors[at * square + e] = v[order[e % n] * n + e / n];
}

// Shared memory, in T: w (n, rows), the matrix's columns, with an odd lead; v (n, n) if placed in
// shared memory; sums (pairs, 8, 3), for 8 threads per pair; rotations (pairs, 2); rotated (pairs).
// Then int order (n).
template <typename T>
__device__ void svd(const T *matrices, T *left, T *values, T *right, T *work, int *info, int rows,
                    int n, int placement, int sweeps, unsigned char *memory) {
    const int m = n + (n & 1), pairs = m / 2, lead = rows | 1, t = threadIdx.x;
    const int threads = blockDim.x;
    const long long at = blockIdx.x, square = static_cast<long long>(n) * n;
    T *w = reinterpret_cast<T *>(memory), *v = w + n * lead;
    T *sums = v + (placement == SHARED ? n * n : 0), *rotations = sums + 24 * pairs;
    T *rotated = rotations + m;
    int *order = reinterpret_cast<int *>(rotated + pairs);
    if (placement != SHARED) v = work + at * square;

    const T *matrix = matrices + at * rows * n;
    for (int e = t; e < rows * n; e += threads) w[e % n * lead + e / n] = matrix[e];
    if (placement != NOWHERE)
        for (int e = t; e < n * n; e += threads) v[e] = e / n == e % n;
    __syncthreads();
    const int scale = rescale(w, lead, n, rows, sums);

    // Columns count as orthogonal if their cosine is within the rounding of a sum of `rows` terms.
    const T tolerance = root(static_cast<T>(rows)) * Float<T>::EPS;
    bool converged = false;
    int sweep = 0;
    for (; !converged && sweep < sweeps; ++sweep) {
        for (int k = t; k < pairs; k += threads) rotated[k] = 0;
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
                // A column too short to have a cosine is below the rounding of the others.
                const bool skip = x < Float<T>::MIN_NORM2 || y < Float<T>::MIN_NORM2;
                // Negated, so that NaN never counts as converged and is reported as a failure.
                if (!(skip || size(z) <= tolerance * root(x) * root(y))) {
                    rotation(x, y, z, &cosine, &sine, &tangent);
                    rotated[k] = 1;
                }
                rotations[2 * k] = cosine;
                rotations[2 * k + 1] = sine;
            }
            __syncthreads();
            rotate_pairs(w, lead, rows, rotations, s, m);
            if (placement != NOWHERE) rotate_pairs(v, n, n, rotations, s, m);
            __syncthreads();
        }
        converged = true;
        for (int k = 0; k < pairs; ++k) converged = converged && rotated[k] == 0;
        __syncthreads();
    }

    if (t == 0) info[at] = converged ? sweep : -1;
    T *norms = sums;
    for (int j = t; j < n; j += threads) {
        T x = 0;
        for (int i = 0; i < rows; ++i) x += w[j * lead + i] * w[j * lead + i];
        norms[j] = root(x);
        order[j] = j;
    }
    __syncthreads();
    if (converged) sort(norms, 1, n, true, order);
    __syncthreads();
    for (int j = t; j < n; j += threads) values[at * n + j] = ldexp(norms[order[j]], scale);
    if (placement == NOWHERE) return;
    for (int e = t; e < rows * n; e += threads) {
        const int j = order[e % n];
        left[at * rows * n + e] =
            norms[j] * norms[j] < Float<T>::MIN_NORM2 ? 0 : w[j * lead + e / n] / norms[j];
    }
    for (int e = t; e < n * n; e += threads) right[at * square + e] = v[order[e / n] * n + e % n];
}

extern "C" __global__ void __launch_bounds__(512, 2)
    jacobi_eigh_f64(const double *a, double *w, double *v, double *work, int *info, int n,
                    int placement, int sweeps) {
    extern __shared__ __align__(16) unsigned char memory[];
    eigh(a, w, v, work, info, n, placement, sweeps, memory);
}

extern "C" __global__ void __launch_bounds__(512, 2)
    jacobi_eigh_f32(const float *a, float *w, float *v, float *work, int *info, int n,
                    int placement, int sweeps) {
    extern __shared__ __align__(16) unsigned char memory[];
    eigh(a, w, v, work, info, n, placement, sweeps, memory);
}

extern "C" __global__ void __launch_bounds__(512, 2)
    jacobi_svd_f64(const double *a, double *u, double *s, double *vh, double *work, int *info,
                   int rows, int n, int placement, int sweeps) {
    extern __shared__ __align__(16) unsigned char memory[];
    svd(a, u, s, vh, work, info, rows, n, placement, sweeps, memory);
}

extern "C" __global__ void __launch_bounds__(512, 2)
    jacobi_svd_f32(const float *a, float *u, float *s, float *vh, float *work, int *info,
                   int rows, int n, int placement, int sweeps) {
    extern __shared__ __align__(16) unsigned char memory[];
    svd(a, u, s, vh, work, info, rows, n, placement, sweeps, memory);
}
