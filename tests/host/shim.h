// CUDA C++ for a host compiler: one CPU thread per thread of a block, one block after another.
//
// Dynamic shared memory has exactly the requested length, for the address sanitizer, and holds NaN
// when a block starts. A launch ends with an error if threads wait at different barriers, which is
// undefined on a GPU, or if an argument's type differs from the parameter's.
#pragma once

#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <new>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
#define __syncthreads() shim::wait_at_barrier(__LINE__)

struct dim3 {
    unsigned x, y, z;
};

struct alignas(8) float2 {
    float x, y;
};

struct alignas(16) float4 {
    float x, y, z, w;
};

struct alignas(16) double2 {
    double x, y;
};

inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }

inline int min(int a, int b) { return b < a ? b : a; }
inline int max(int a, int b) { return a < b ? b : a; }
inline long long min(long long a, long long b) { return b < a ? b : a; }
inline long long max(long long a, long long b) { return a < b ? b : a; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }

inline thread_local dim3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace shim {

inline unsigned char *dynamic_shared;
inline std::string error;

// The line at which each thread of the block waits; 0 for one that has returned.
inline std::vector<int> lines;
inline thread_local unsigned self;

struct CheckLines {
    void operator()() noexcept {
        int common = 0;
        for (int line : lines) {
            if (common && line && line != common)
                error = "threads wait at different barriers, lines " + std::to_string(common) +
                        " and " + std::to_string(line);
            common = line ? line : common;
        }
    }
};

inline std::barrier<CheckLines> *barrier;

inline void wait_at_barrier(int line) {
    lines[self] = line;
    barrier->arrive_and_wait();
}

// "f8" for double, "pi4" for int *, "pv" for a pointer to anything.
template <typename T>
std::string kind() {
    if constexpr (std::is_pointer_v<T>) {
        using Element = std::remove_cv_t<std::remove_pointer_t<T>>;
        if constexpr (std::is_void_v<Element>)
            return "pv";
        else
            return "p" + kind<Element>();
    } else {
        const char *letter = std::is_floating_point_v<T> ? "f" : std::is_signed_v<T> ? "i" : "u";
        return letter + std::to_string(sizeof(T));
    }
}

inline void expect(const std::string &parameter, const std::string &argument, size_t position) {
    if (parameter != argument && !(parameter == "pv" && argument[0] == 'p'))
        error = "argument " + std::to_string(position) + " is " + argument + ", not " + parameter;
}

template <typename... P, size_t... I>
void run(void (*kernel)(P...), std::vector<std::string> kinds, void *const *values, size_t bytes,
         std::index_sequence<I...>) {
    error.clear();
    if (kinds.size() != sizeof...(P)) {
        error = std::to_string(kinds.size()) + " arguments, not " + std::to_string(sizeof...(P));
        return;
    }
    (expect(kind<P>(), kinds[I], I), ...);
    unsigned threads = blockDim.x * blockDim.y * blockDim.z;
    if (threads > 1024 || bytes > 227 * 1024)
        error = "a block of " + std::to_string(threads) + " threads and " + std::to_string(bytes) +
                " bytes of shared memory";
    if (!error.empty())
        return;
    constexpr std::align_val_t alignment{16};
    const auto release = [](void *memory) { operator delete(memory, alignment); };
    std::unique_ptr<void, decltype(release)> memory(operator new(bytes, alignment), release);
    dynamic_shared = static_cast<unsigned char *>(memory.get());
    for (unsigned block = 0; block < gridDim.x * gridDim.y * gridDim.z; ++block) {
        memset(dynamic_shared, 0xff, bytes);
        lines.assign(threads, 0);
        std::barrier<CheckLines> rendezvous(threads);
        barrier = &rendezvous;
        std::vector<std::thread> team;
        for (unsigned thread = 0; thread < threads; ++thread)
            team.emplace_back([=] {
                self = thread;
                threadIdx = {thread % blockDim.x, thread / blockDim.x % blockDim.y,
                             thread / (blockDim.x * blockDim.y)};
                blockIdx = {block % gridDim.x, block / gridDim.x % gridDim.y,
                            block / (gridDim.x * gridDim.y)};
                kernel(*static_cast<P *>(values[I])...);
                lines[self] = 0;
                barrier->arrive_and_drop();
            });
        for (std::thread &member : team)
            member.join();
    }
}

template <typename... P>
void launch(void (*kernel)(P...), const std::vector<std::string> &kinds, void *const *values,
            size_t bytes) {
    run(kernel, kinds, values, bytes, std::index_sequence_for<P...>{});
}

// Launches the kernel of this name; _build.py generates it from the source's kernels.
void launch_by_name(const std::string &name, const std::vector<std::string> &kinds,
                    void *const *values, size_t bytes);

}  // namespace shim

// Grid and block are three numbers each; returns an error message, or an empty string.
extern "C" const char *shim_launch(const char *name, const unsigned *sizes, size_t bytes,
                                   int count, const char *const *kinds, void *const *values) {
    gridDim = {sizes[0], sizes[1], sizes[2]};
    blockDim = {sizes[3], sizes[4], sizes[5]};
    shim::launch_by_name(name, std::vector<std::string>(kinds, kinds + count), values, bytes);
    return shim::error.c_str();
}

// A launch from the command line, for sanitizers: name, sizes, bytes, then KIND:FILE for each
// argument. The files of pointers are read into memory of exactly their length and written back.
#ifdef SHIM_MAIN
int main(int count, char **words) {
    unsigned sizes[6];
    for (int k = 0; k < 6; ++k)
        sizes[k] = strtoul(words[2 + k], nullptr, 10);
    std::vector<std::string> kinds, files;
    for (int k = 9; k < count; ++k) {
        std::string word = words[k];
        kinds.push_back(word.substr(0, word.find(':')));
        files.push_back(word.substr(word.find(':') + 1));
    }
    std::vector<std::unique_ptr<char[]>> memory;
    std::vector<size_t> lengths;
    for (const std::string &file : files) {
        lengths.push_back(std::filesystem::file_size(file));
        memory.emplace_back(new char[lengths.back()]);
        std::ifstream(file, std::ios::binary).read(memory.back().get(), lengths.back());
    }
    std::vector<void *> pointers, values;
    for (const auto &buffer : memory)
        pointers.push_back(buffer.get());
    for (size_t k = 0; k < kinds.size(); ++k)
        values.push_back(kinds[k][0] == 'p' ? static_cast<void *>(&pointers[k]) : pointers[k]);
    std::vector<const char *> names;
    for (const std::string &kind : kinds)
        names.push_back(kind.c_str());
    const char *error = shim_launch(words[1], sizes, strtoull(words[8], nullptr, 10), kinds.size(),
                                    names.data(), values.data());
    for (size_t k = 0; k < kinds.size(); ++k)
        if (kinds[k][0] == 'p')
            std::ofstream(files[k], std::ios::binary).write(memory[k].get(), lengths[k]);
    fputs(error, stderr);
    return *error ? 1 : 0;
}
#endif
