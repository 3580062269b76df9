// case: a cache that grows by a block of entries whenever that is full, six times
#include "case.h"

static void *entries[6 * 400];

static NOINLINE void *entry(void) { return filled(malloc(180), 180); }

int main(int argc, char **argv)
{
    unsigned request = 0, filled_to = 0;
    for (begin(argc, argv); next_request(100);) {
        scratch();
        if (++request % 1000 == 0 && filled_to < 6 * 400)
            for (int i = 0; i < 400; i++)
                entries[filled_to++] = entry();
        // From then on entries are replaced.
        if (filled_to == 6 * 400) {
            unsigned slot = below(filled_to);
            free(entries[slot]);
            entries[slot] = entry();
        }
    }
}
