// case: records are collected for 45 seconds and written at once
#include "case.h"

enum { MOST = 8000 };

static void *records[MOST];
static unsigned collected;

static NOINLINE void *record(void) { return filled(malloc(200), 200); }

int main(int argc, char **argv)
{
    unsigned request = 0;
    for (begin(argc, argv); next_request(120);) {
        scratch();
        if (collected < MOST)
            records[collected++] = record();
        if (++request % 5400 == 0)
            while (collected > 0)
                free(records[--collected]);
    }
}
