// Where a fiber of the CPU shim was left, and the switch from one to another; scheduler.cpp alone includes it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#if defined(__x86_64__)
// Saves the registers that a function must keep, and goes on where `to` was left. ucontext would cost two system calls a switch.
extern "C" void ltxk_shim_switch(void** from, void* to);
asm(R"(
.text
.globl ltxk_shim_switch
.hidden ltxk_shim_switch
.type ltxk_shim_switch, @function
ltxk_shim_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size ltxk_shim_switch, .-ltxk_shim_switch
)");

struct Context {
    void* stack_pointer = nullptr;

    void prepare(void* stack, std::size_t bytes, void (*entry)()) {
        auto* top = reinterpret_cast<std::uint64_t*>(static_cast<char*>(stack) + bytes) - 10;
        std::fill(top, top + 10, 0);
        top[6] = reinterpret_cast<std::uint64_t>(entry);
        stack_pointer = top;
    }
    static void change(Context& from, Context& to) { ltxk_shim_switch(&from.stack_pointer, to.stack_pointer); }
};
#else
#include <ucontext.h>

struct Context {
    ucontext_t context;

    void prepare(void* stack, std::size_t bytes, void (*entry)()) {
        getcontext(&context);
        context.uc_stack.ss_sp = stack;
        context.uc_stack.ss_size = bytes;
        context.uc_link = nullptr;
        makecontext(&context, entry, 0);
    }
    static void change(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
};
#endif
