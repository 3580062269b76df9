// case: the same, where a few keys are asked for most and the rarest hardly ever (Zipf)
#include "case.h"

enum { KEYS = 1500 };

static void *values[KEYS];

static NOINLINE void *computed(void) { return filled(malloc(250), 250); }

int main(int argc, char **argv)
{
    for (begin(argc, argv); next_request(250);) {
        scratch();
        // By the inverse of a distribution that is close to Zipf's.
        unsigned key = (unsigned)(__builtin_pow(KEYS, 1 - fraction())) % KEYS;
        if (values[key] == NULL)
            values[key] = computed();
    }
}
