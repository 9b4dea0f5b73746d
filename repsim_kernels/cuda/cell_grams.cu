// Gram matrices of the stimuli, one for each cell of neurons, from one read of the activations.
//
// A block computes a tile of 64 x 64 products for one chunk of a cell's neurons. Each of its 128
// threads has 4 x 8 of them in registers, so it reads 12 numbers from shared memory for every 32
// multiplications. Tiles above the diagonal are skipped. A second kernel sums the chunks in a fixed
// order, so the result does not depend on which block finishes first.
//
// The first stimulus is subtracted from all others as they are loaded: a constant neuron gives
// exact zeros, and a large mean costs no digits. The Gram of these differences is centred
// afterwards.

constexpr int TILE = 64;     // stimuli
constexpr int DEPTH = 16;    // neurons per step
constexpr int RUN = 128;     // neurons summed in T before float64: an error within 128 / 2^24
constexpr int THREADS = 128; // 16 along the rows, 8 along the columns
constexpr int ROWS = 4;      // per thread, 16 apart: a warp's threads read the same rows
constexpr int COLUMNS = 8;   // per thread, 8 apart: no bank conflicts

// Number of tiles on and below the diagonal.
__device__ __forceinline__ int tile_count(int n) {
    const int tiles = (n + TILE - 1) / TILE;
    return tiles * (tiles + 1) / 2;
}

// Row and column of the tile with this number.
__device__ __forceinline__ void tile_position(int tile, int *i, int *j) {
    int row = 0;
    while ((row + 1) * (row + 2) / 2 <= tile) ++row;
    *i = row;
    *j = tile - row * (row + 1) / 2;
}

// Load 64 stimuli of 16 neurons, scaled and relative to the first stimulus; zeros out of bounds.
template <typename T>
__device__ __forceinline__ void load(T (*to)[TILE], const T *x, const int *order, long long at,
                                     long long last, int first_row, int n, long long stride_n,
                                     long long stride_p, T scale) {
    for (int e = threadIdx.x; e < DEPTH * TILE; e += THREADS) {
        const int k = e / TILE, row = first_row + e % TILE;
        T value = 0;
        if (at + k < last && row < n) {
            const T *neuron = x + order[at + k] * stride_p;
            // Scale by the power of two first: the difference of two large numbers would overflow.
            value = neuron[row * stride_n] * scale - neuron[0] * scale;
        }
        to[k][e % TILE] = value;
    }
}

// Grid: chunks · tiles. The tiles of one chunk are adjacent, so all but the first find its neurons
// in the L2 cache. An item holds a chunk's bounds in `order` and the slot of its tiles in `partial`
// (slots, tiles, 64, 64).
template <typename T>
__device__ void gram_tile(const T *x, const int *order, const long long *items, const T *scale_ptr,
                          double *partial, int n, long long stride_n, long long stride_p) {
    __shared__ T a[DEPTH][TILE], b[DEPTH][TILE];
    const int tiles = tile_count(n), tile = blockIdx.x % tiles;
    const long long *item = items + 3LL * (blockIdx.x / tiles);
    const long long first = item[0], last = item[1], slot = item[2];
    const T scale = *scale_ptr;
    const int r = threadIdx.x / 8, c = threadIdx.x % 8;
    int i, j;
    tile_position(tile, &i, &j);
    double total[ROWS][COLUMNS] = {};
    for (long long run = first; run < last; run += RUN) {
        T sum[ROWS][COLUMNS] = {};
        const long long end = run + RUN < last ? run + RUN : last;
        for (long long at = run; at < end; at += DEPTH) {
            load(a, x, order, at, end, i * TILE, n, stride_n, stride_p, scale);
            load(b, x, order, at, end, j * TILE, n, stride_n, stride_p, scale);
            __syncthreads();
            for (int k = 0; k < DEPTH; ++k) {
                T left[ROWS], right[COLUMNS];
                for (int u = 0; u < ROWS; ++u) left[u] = a[k][r + 16 * u];
                for (int v = 0; v < COLUMNS; ++v) right[v] = b[k][c + 8 * v];
                for (int u = 0; u < ROWS; ++u)
                    for (int v = 0; v < COLUMNS; ++v) sum[u][v] += left[u] * right[v];
            }
            __syncthreads();
        }
        for (int u = 0; u < ROWS; ++u)
            for (int v = 0; v < COLUMNS; ++v) total[u][v] += sum[u][v];
    }
    double *out = partial + (slot * tiles + tile) * (TILE * TILE);
    for (int u = 0; u < ROWS; ++u)
        for (int v = 0; v < COLUMNS; ++v)
            out[(r + 16 * u) * TILE + c + 8 * v] = total[u][v];
}

extern "C" __global__ void __launch_bounds__(128, 2)
    cell_grams_f64(const double *x, const int *order, const long long *items, const double *scale,
                   double *partial, int n, long long stride_n, long long stride_p) {
    gram_tile(x, order, items, scale, partial, n, stride_n, stride_p);
}

extern "C" __global__ void __launch_bounds__(128, 2)
    cell_grams_f32(const float *x, const int *order, const long long *items, const float *scale,
                   double *partial, int n, long long stride_n, long long stride_p) {
    gram_tile(x, order, items, scale, partial, n, stride_n, stride_p);
}

// Grid: cells · tiles. Cell c owns the slots from slots[c] up to slots[c + 1]; g is (cells, n, n).
extern "C" __global__ void __launch_bounds__(128, 2)
    cell_grams_sum(const double *partial, const long long *slots, const double *unit, double *g,
                   int n) {
    const int tiles = tile_count(n), tile = blockIdx.x % tiles, cell = blockIdx.x / tiles;
    int i, j;
    tile_position(tile, &i, &j);
    const long long first = slots[cell], last = slots[cell + 1];
    g += static_cast<long long>(cell) * n * n;
    for (int e = threadIdx.x; e < TILE * TILE; e += blockDim.x) {
        const int row = i * TILE + e / TILE, column = j * TILE + e % TILE;
        if (row >= n || column > row) continue;
        double total = 0;
        for (long long slot = first; slot < last; ++slot)
            total += partial[(slot * tiles + tile) * (TILE * TILE) + e];
        total = total * *unit * *unit;
        g[static_cast<long long>(row) * n + column] = total;
        g[static_cast<long long>(column) * n + row] = total;
    }
}
