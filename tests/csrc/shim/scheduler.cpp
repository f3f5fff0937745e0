// The scheduler of the CPU shim: runs the fibers of a block or a cooperative grid, and checks what they wait for.
//
// An error is raised where threads of a block wait at different barriers, where a thread leaves while others wait for it, where a
// shuffle names lanes that never come, and where nothing can go on. Fiber order is random and seeded, so that a missing barrier
// shows as a wrong value; shared memory is poisoned, and every piece is its own heap block, so that ASan sees a step outside it.
#include <sys/mman.h>

#include <algorithm>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "context.h"
#include "runtime.h"
#include "shim.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace ltxk::shim {

constexpr std::size_t kStackBytes = 64 << 10;
enum class State { kReady, kBlock, kWarp, kDone };

struct Block;

struct Fiber {
    Context context;
    void* stack = nullptr;
    Block* block = nullptr;
    unsigned thread = 0;
    unsigned warp = 0;  // among those that run together
    State state = State::kReady;
    const void* site = nullptr;
    unsigned mask = 0;
    std::uint64_t value = 0, received[32] = {};
    void* fake_stack = nullptr;
    AsyncCopies copies;
};

struct Block {
    Dim3 index;
    unsigned stalled = 0;  // rounds that the scheduler leaves this block out
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::map<const void*, std::vector<unsigned char>> shared;
    std::vector<unsigned char> dynamic;
};

static std::mt19937 random_engine(0);
static bool shuffled = true;
static Context scheduler_context;
#if defined(__SANITIZE_ADDRESS__)
static void* scheduler_fake_stack = nullptr;
static const void* scheduler_stack = nullptr;
static std::size_t scheduler_stack_bytes = 0;
#endif
static Fiber* current = nullptr;
static const KernelEntry* running = nullptr;
static const void* running_parameters = nullptr;
static bool progressed = false;

void set_schedule(unsigned seed, bool shuffle) {
    random_engine.seed(seed);
    shuffled = shuffle;
}

static std::size_t only_first = 0, only_count = 0;

void set_only(std::size_t first, std::size_t count) {
    only_first = first;
    only_count = count;
}

static void leave([[maybe_unused]] bool last) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(last ? nullptr : &current->fake_stack, scheduler_stack, scheduler_stack_bytes);
#endif
    [[maybe_unused]] Fiber* self = current;
    Context::change(self->context, scheduler_context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(self->fake_stack, &scheduler_stack, &scheduler_stack_bytes);
#endif
}

static void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
    running->call(running_parameters);
    current->state = State::kDone;
    leave(true);
}

static void resume(Fiber& fiber) {
    current = &fiber;
    threadIdx = {fiber.thread, 0, 0};
    blockIdx = fiber.block->index;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&scheduler_fake_stack, fiber.stack, kStackBytes);
#endif
    Context::change(scheduler_context, fiber.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
}

static void wait_at(State state, const void* site) {
    progressed = true;
    current->state = state;
    current->site = site;
    leave(false);
}

static std::string failure;

// Called on a fiber, whose stack no exception may leave: the scheduler raises it.
[[noreturn]] static void fail(const char* what) {
    failure = what;
    leave(false);
    __builtin_unreachable();
}

void sync_block(const void* site) { wait_at(State::kBlock, site); }
void yield() { leave(false); }
unsigned lane() { return current->thread % 32; }

void sync_warp(unsigned mask, const void* site) { exchange(mask, 0, lane(), site); }

std::uint64_t exchange(unsigned mask, std::uint64_t value, unsigned source, const void* site) {
    if (!(mask >> lane() & 1u)) fail("a lane is not in the mask that it shuffles with");
    current->mask = mask;
    current->value = value;
    Fiber* self = current;
    wait_at(State::kWarp, site);
    return self->received[source];
}

void gather(std::uint64_t value, std::uint64_t (&values)[32], const void* site) {
    Fiber* self = current;
    exchange(0xffffffffu, value, lane(), site);
    std::copy(std::begin(self->received), std::end(self->received), values);
}

unsigned vote(unsigned mask, bool value, const void* site) {
    Fiber* self = current;
    exchange(mask, value, lane(), site);
    unsigned result = 0;
    for (unsigned i = 0; i < 32; ++i)
        if (mask >> i & 1u) result |= static_cast<unsigned>(self->received[i] & 1u) << i;
    return result;
}

void* shared_memory(const void* site, std::size_t bytes) {
    auto& memory = current->block->shared[site];
    if (memory.empty()) memory.assign(bytes, 0xCD);
    return memory.data();
}

void* dynamic_shared_memory() { return current->block->dynamic.data(); }

void require_aligned(const void* address, std::size_t bytes) {
    if (reinterpret_cast<std::uint64_t>(address) % bytes != 0) fail("an address that is not aligned to its access");
}

void require_shared(const void* address, std::size_t bytes) {
    require_aligned(address, bytes);
    auto holds = [&](const std::vector<unsigned char>& memory) {
        auto* first = static_cast<const unsigned char*>(address);
        return first >= memory.data() && first + bytes <= memory.data() + memory.size();
    };
    if (holds(current->block->dynamic)) return;
    for (auto& [site, memory] : current->block->shared)
        if (holds(memory)) return;
    fail("an address outside shared memory");
}

AsyncCopies& async_copies() { return current->copies; }
bool lands_at_once() { return shuffled && random_engine() % 2 == 0; }

static std::string where(const Fiber& fiber) {
    return "thread " + std::to_string(fiber.thread) + " of block " + std::to_string(fiber.block->index.x);
}

// Releases the fibers of a block if all of them wait at one barrier.
static bool release(const std::vector<Fiber*>& group) {
    const Fiber *waiting = nullptr, *done = nullptr;
    for (Fiber* fiber : group) {
        if (fiber->state == State::kDone) {
            done = fiber;
            continue;
        }
        if (fiber->state != State::kBlock) return false;
        if (waiting && waiting->site != fiber->site)
            throw std::runtime_error("barrier divergence: " + where(*waiting) + " and " + where(*fiber) + " wait at different barriers");
        waiting = fiber;
    }
    if (!waiting) return false;
    if (done) throw std::runtime_error("barrier divergence: " + where(*done) + " left while " + where(*waiting) + " waits at a barrier");
    for (Fiber* fiber : group) fiber->state = State::kReady;
    return true;
}

// Completes the shuffle that the lanes of `warp` wait in, if all lanes of its mask have come.
static bool release_warp(const std::vector<Fiber*>& warp) {
    bool any = false;
    for (Fiber* fiber : warp) {
        if (fiber->state != State::kWarp) continue;
        unsigned mask = fiber->mask;
        bool complete = true;
        for (unsigned i = 0; i < 32 && complete; ++i) {
            if (!(mask >> i & 1u)) continue;
            if (i >= warp.size() || warp[i]->state == State::kDone)
                throw std::runtime_error("shuffle mask names lane " + std::to_string(i) + ", which is not there: " + where(*fiber));
            complete = warp[i]->state == State::kWarp;
            if (complete && (warp[i]->site != fiber->site || warp[i]->mask != mask))
                throw std::runtime_error("shuffle divergence: " + where(*fiber) + " and " + where(*warp[i]));
        }
        if (!complete) continue;
        for (unsigned i = 0; i < 32; ++i)
            if (mask >> i & 1u)
                for (unsigned j = 0; j < 32; ++j) warp[i]->received[j] = mask >> j & 1u ? warp[j]->value : 0xDEADBEEFDEADBEEFull;
        for (unsigned i = 0; i < 32; ++i)
            if (mask >> i & 1u) warp[i]->state = State::kReady;
        any = true;
    }
    return any;
}

struct Stacks {
    std::vector<void*> free;
    void* take() {
        if (free.empty()) {
            void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            if (stack == MAP_FAILED) throw std::bad_alloc();
            return stack;
        }
        void* stack = free.back();
        free.pop_back();
        return stack;
    }
};
static Stacks stacks;

// Runs blocks that may depend on each other until all are done.
static void run_together(std::vector<std::unique_ptr<Block>>& blocks) {
    std::vector<Fiber*> all;
    std::vector<std::vector<Fiber*>> per_block, per_warp;
    for (auto& block : blocks) {
        per_block.emplace_back();
        for (auto& fiber : block->fibers) {
            if (fiber->thread % 32 == 0) per_warp.emplace_back();
            fiber->warp = static_cast<unsigned>(per_warp.size() - 1);
            all.push_back(fiber.get());
            per_block.back().push_back(fiber.get());
            per_warp.back().push_back(fiber.get());
        }
    }
    std::vector<unsigned> warp_stalled(per_warp.size());
    // Now and then a block or a warp does nothing for some rounds.
    auto stall = [](unsigned& stalled, unsigned odds) {
        if (stalled > 0) --stalled;
        else if (shuffled && random_engine() % odds == 0) stalled = random_engine() % 200;
    };
    for (unsigned idle = 0;;) {
        if (shuffled) std::shuffle(all.begin(), all.end(), random_engine);
        progressed = false;
        bool ran = false, done = true;
        // Some blocks and warps fall far behind the others: who does not wait for them reads what they have not written.
        if (blocks.size() > 1)
            for (auto& block : blocks) stall(block->stalled, 32);
        if (per_warp.size() > 1)
            for (unsigned& stalled : warp_stalled) stall(stalled, 512);
        for (Fiber* fiber : all) {
            if (fiber->state == State::kReady && (fiber->block->stalled > 0 || warp_stalled[fiber->warp] > 0)) {
                progressed = true;
            } else if (fiber->state == State::kReady) {
                ran = true;
                resume(*fiber);
                if (!failure.empty()) throw std::runtime_error(std::exchange(failure, {}) + ": " + where(*fiber));
                if (fiber->state == State::kDone) progressed = true;
            }
            done = done && fiber->state == State::kDone;
        }
        if (done) return;
        for (auto& warp : per_warp) progressed |= release_warp(warp);
        for (auto& block : per_block) progressed |= release(block);
        idle = progressed ? 0 : idle + 1;
        if (idle > (ran ? 10000u : 1u)) throw std::runtime_error("deadlock: no thread of the grid can go on");
    }
}

static void start(Block& block, unsigned threads, unsigned shared_bytes) {
    block.dynamic.assign(shared_bytes, 0xCD);
    for (unsigned t = 0; t < threads; ++t) {
        auto fiber = std::make_unique<Fiber>();
        fiber->block = &block;
        fiber->thread = t;
        fiber->stack = stacks.take();
        fiber->context.prepare(fiber->stack, kStackBytes, fiber_main);
        block.fibers.push_back(std::move(fiber));
    }
}

void run_grid(const KernelEntry& kernel, const LaunchShape& shape, const void* parameters) {
    running = &kernel;
    running_parameters = parameters;
    blockDim = {shape.block, 1, 1};
    gridDim = {shape.grid[0], shape.grid[1], shape.grid[2]};
    std::size_t total = static_cast<std::size_t>(gridDim.x) * gridDim.y * gridDim.z;
    std::size_t together = shape.cooperative ? total : 1;
    std::size_t begin = only_count ? only_first : 0, end = only_count ? std::min(total, only_first + only_count) : total;
    for (std::size_t first = begin; first < end; first += together) {
        std::vector<std::unique_ptr<Block>> blocks;
        for (std::size_t b = first; b < std::min(end, first + together); ++b) {
            auto block = std::make_unique<Block>();
            block->index = {static_cast<unsigned>(b % gridDim.x), static_cast<unsigned>(b / gridDim.x % gridDim.y),
                            static_cast<unsigned>(b / gridDim.x / gridDim.y)};
            start(*block, shape.block, shape.shared_bytes);
            blocks.push_back(std::move(block));
        }
        struct Return {
            std::vector<std::unique_ptr<Block>>& blocks;
            ~Return() {
                for (auto& block : blocks)
                    for (auto& fiber : block->fibers) stacks.free.push_back(fiber->stack);
            }
        } give_back{blocks};
        run_together(blocks);
    }
}

}  // namespace ltxk::shim
