// case: a cache of what is asked for at random among 2,000 keys, filled ever more slowly
#include "case.h"

enum { KEYS = 2000 };

static void *values[KEYS];

static NOINLINE void *computed(void)
{
    size_t size = between(50, 500);
    return filled(malloc(size), size);
}

int main(int argc, char **argv)
{
    for (begin(argc, argv); next_request(100);) {
        scratch();
        unsigned key = below(KEYS);
        if (values[key] == NULL)
            values[key] = computed();
    }
}
