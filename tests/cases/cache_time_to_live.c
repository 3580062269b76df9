// case: entries are kept for 25 seconds and not for how much they are used
#include "case.h"

enum { PER_SECOND = 100, LIFE = 25 * PER_SECOND };

static void *entries[LIFE];
static unsigned next;

static NOINLINE void *entry(void) { return filled(malloc(300), 300); }

int main(int argc, char **argv)
{
    for (begin(argc, argv); next_request(PER_SECOND);) {
        scratch();
        free(entries[next % LIFE]);
        entries[next++ % LIFE] = entry();
    }
}
