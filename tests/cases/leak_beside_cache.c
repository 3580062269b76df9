// case: a cache that is full after a while, and a leak of half its rate by the same wrapper
#include "case.h"

enum { SLOTS = 3000 };

static void *cache[SLOTS];
static unsigned next;

static void *wrapper(size_t size) { return filled(malloc(size), size); }
static NOINLINE void *cached(void) { return wrapper(300); }
static NOINLINE void *leak_header(void) { return wrapper(300); }

int main(int argc, char **argv)
{
    for (begin(argc, argv); next_request(100);) {
        free(cache[next % SLOTS]);
        cache[next++ % SLOTS] = cached();
        if (one_in(2))
            leak_header();
    }
}
