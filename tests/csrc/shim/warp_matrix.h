// Tensor cores, matrix loads and asynchronous copies on fibers: each lane publishes its registers or its address, and computes its
// own part from what the others published, by the layouts of the PTX manual.
#pragma once

namespace ltxk {

struct f16;
struct bf16;

namespace shim {

inline float half_value(std::uint32_t bits, const f16*) { return static_cast<float>(bit_cast<_Float16>(static_cast<std::uint16_t>(bits))); }
inline float half_value(std::uint32_t bits, const bf16*) { return bit_cast<float>(bits << 16); }

// fp32 by cutting off, as tensor cores do; half_value and the products before it are exact.
inline float cut(double v) {
    float nearest = static_cast<float>(v);
    return std::fabs(static_cast<double>(nearest)) > std::fabs(v) && !std::isinf(nearest) ? std::nextafterf(nearest, 0.0f) : nearest;
}

// A sum as tensor cores take it: every addend is aligned to the largest one, and cut off one bit behind the last of its 24; so is the sum,
// without that bit. Sources: Fasi et al. 2021, Khattak and Mikaitis 2025, for A100; Hopper keeps one bit more.
template <int COUNT>
inline float aligned_sum(const double (&addends)[COUNT]) {
    double largest = 0.0, sum = 0.0;
    for (double v : addends) largest = std::fabs(v) > largest ? std::fabs(v) : largest, sum += v;
    if (largest == 0.0 || !std::isfinite(sum)) return static_cast<float>(sum);
    double unit = bit_cast<double>(bit_cast<std::uint64_t>(largest) & 0x7ff0000000000000ull) * 0x1p-24;
    std::int64_t units = 0;
    for (double v : addends) units += static_cast<std::int64_t>(v / unit);
    return cut(static_cast<double>(units) * unit);
}

inline void gather_rows(const void* row, std::uint64_t (&rows)[32], const void* site) {
    require_shared(row, 16);
    gather(reinterpret_cast<std::uint64_t>(row), rows, site);
}

inline std::uint16_t half_at(std::uint64_t row, unsigned column) {
    std::uint16_t half;
    std::memcpy(&half, reinterpret_cast<const char*>(row) + 2 * column, sizeof(half));
    return half;
}

inline void land(const AsyncCopies::Copy& copy) {
    if (copy.exists) std::memcpy(copy.shared, copy.global, copy.bytes);
    else std::memset(copy.shared, 0, copy.bytes);
}

}  // namespace shim

template <class Half>
inline void warp_mma(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
    static char site;
    std::uint64_t words[3][32];
    shim::gather(a[0] | static_cast<std::uint64_t>(a[1]) << 32, words[0], &site);
    shim::gather(a[2] | static_cast<std::uint64_t>(a[3]) << 32, words[1], &site);
    shim::gather(b[0] | static_cast<std::uint64_t>(b[1]) << 32, words[2], &site);
    // Register `index` of a lane's six, and the half of it that holds an even or an odd row or column.
    auto element = [&](unsigned lane, unsigned index, unsigned odd) {
        auto word = static_cast<std::uint32_t>(words[index / 2][lane] >> index % 2 * 32);
        return shim::half_value(word >> odd * 16 & 0xffffu, static_cast<const Half*>(nullptr));
    };
    unsigned lane = shim::lane();
    double left[2][16], right[16][2];
    for (unsigned k = 0; k < 16; ++k)
        for (unsigned i = 0; i < 2; ++i) {
            left[i][k] = element(lane / 4 * 4 + k % 8 / 2, i + k / 8 * 2, k % 2);
            right[k][i] = element((lane % 4 * 2 + i) * 4 + k % 8 / 2, 4 + k / 8, k % 2);
        }
    // Two sums of eight products each, as on A100.
    for (unsigned i = 0; i < 4; ++i)
        for (unsigned first = 0; first < 16; first += 8) {
            double addends[9] = {d[i]};
            for (unsigned k = 0; k < 8; ++k) addends[1 + k] = left[i / 2][first + k] * right[first + k][i % 2];
            d[i] = shim::aligned_sum(addends);
        }
}

inline void load_matrices(std::uint32_t (&r)[4], const void* row) {
    static char site;
    std::uint64_t rows[32];
    shim::gather_rows(row, rows, &site);
    unsigned lane = shim::lane();
    for (unsigned j = 0; j < 4; ++j) {
        std::uint64_t mine = rows[8 * j + lane / 4];
        r[j] = shim::half_at(mine, lane % 4 * 2) | static_cast<std::uint32_t>(shim::half_at(mine, lane % 4 * 2 + 1)) << 16;
    }
}

inline void load_matrices_transposed(std::uint32_t (&r)[4], const void* row) {
    static char site;
    std::uint64_t rows[32];
    shim::gather_rows(row, rows, &site);
    unsigned lane = shim::lane();
    for (unsigned j = 0; j < 4; ++j) {
        const std::uint64_t* first = rows + 8 * j + lane % 4 * 2;
        r[j] = shim::half_at(first[0], lane / 4) | static_cast<std::uint32_t>(shim::half_at(first[1], lane / 4)) << 16;
    }
}

inline void copy_bytes_async(void* shared, const void* global, std::size_t bytes, bool exists) {
    shim::require_shared(shared, bytes);
    shim::require_aligned(global, bytes);
    shim::AsyncCopies::Copy copy{shared, global, bytes, exists};
    if (shim::lands_at_once()) shim::land(copy);
    else shim::async_copies().groups.back().push_back(copy);
}
inline void copy_async(void* shared, const void* global, bool exists) { copy_bytes_async(shared, global, 16, exists); }
inline void copy_async_eight(void* shared, std::uint32_t offset, const void* global) {
    copy_bytes_async(static_cast<char*>(shared) + offset, global, 8, true);
}
inline void copy_async_word(void* shared, const void* global, bool exists) { copy_bytes_async(shared, global, 4, exists); }

inline void commit_copies() { shim::async_copies().groups.emplace_back(); }

template <int N>
inline void wait_copies() {
    auto& groups = shim::async_copies().groups;
    // The last entry is the group that is still open.
    while (groups.size() > N + 1) {
        for (const auto& copy : groups.front()) shim::land(copy);
        groups.erase(groups.begin());
    }
}

inline void prefetch_l2(const void*) {}

}  // namespace ltxk
