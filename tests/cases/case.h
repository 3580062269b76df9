// What the labelled cases have in common. Each is called as
//
//   CASE SECONDS SEED [told]
//
// and works for so long at so many requests a second as it says of itself; with a third argument only once it is told to
// by a line, so that it is traced from the start. What is allocated in a function whose name begins with `leak_` is leaked
// by it; nothing else is, however long it is kept. So these functions call the allocator themselves, alike as they are: a
// helper would be the nearest frame. A case begins with
//
//   // case: what it does
#pragma once
#define _GNU_SOURCE

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define NOINLINE __attribute__((noinline))

static double case_seconds;
static uint64_t case_random;
static struct timespec case_start, case_next;

static inline uint64_t random_bits(void)
{
    // SplitMix64 (Steele, Lea and Flood, 2014).
    uint64_t z = case_random += 0x9E3779B97F4A7C15;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
    z = (z ^ z >> 27) * 0x94D049BB133111EB;
    return z ^ z >> 31;
}

static inline unsigned below(unsigned limit) { return (unsigned)(random_bits() % limit); }
static inline int one_in(unsigned number) { return below(number) == 0; }
// From least to most.
static inline size_t between(size_t least, size_t most) { return least + (size_t)(random_bits() % (most - least + 1)); }
// From 0 to 1, without 0.
static inline double fraction(void) { return (double)((random_bits() >> 11) + 1) / 9007199254740992.0; }

static inline double elapsed(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)(now.tv_sec - case_start.tv_sec) + (double)(now.tv_nsec - case_start.tv_nsec) / 1e9;
}

static inline void begin(int argc, char **argv)
{
    case_seconds = argc > 1 ? atof(argv[1]) : 60;
    case_random = argc > 2 ? strtoull(argv[2], NULL, 10) : 1;
    if (argc > 3)
        getchar();
    clock_gettime(CLOCK_MONOTONIC, &case_start);
    case_next = case_start;
}

// Waits for the next of so many requests a second. False once it is time to end.
static inline int next_request(double per_second)
{
    case_next.tv_nsec += (long)(1e9 / per_second);
    while (case_next.tv_nsec >= 1000000000) {
        case_next.tv_nsec -= 1000000000;
        case_next.tv_sec++;
    }
    clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &case_next, NULL);
    return elapsed() < case_seconds;
}

// Writes to it, so that it is there and nothing is optimized away.
static inline void *filled(void *block, size_t size)
{
    if (block == NULL)
        abort();
    memset(block, 'x', size);
    __asm__ volatile("" : : "r"(block) : "memory");
    return block;
}

// Some work as any request has it: blocks that are gone at its end.
static NOINLINE void scratch(void)
{
    void *blocks[4];
    for (int i = 0; i < 4; i++) {
        size_t size = between(16, 600);
        blocks[i] = filled(malloc(size), size);
    }
    for (int i = 0; i < 4; i++)
        free(blocks[i]);
}
