// case: 40 features each set up their state when they are first used, the last of them late
#include "case.h"

static void *states[40];

static NOINLINE void *state(void) { return filled(malloc(3000), 3000); }

int main(int argc, char **argv)
{
    for (begin(argc, argv); next_request(100);) {
        scratch();
        // The higher the number, the more seldom it is used.
        unsigned feature = 0;
        while (feature < 39 && !one_in(6))
            feature++;
        if (states[feature] == NULL)
            states[feature] = state();
    }
}
