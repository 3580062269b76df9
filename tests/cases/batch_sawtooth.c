// case: records are collected for eight seconds and written at once
#include "case.h"

enum { MOST = 4000 };

static void *records[MOST];
static unsigned collected;

static NOINLINE void *record(void)
{
    size_t size = between(80, 400);
    return filled(malloc(size), size);
}

int main(int argc, char **argv)
{
    unsigned request = 0;
    for (begin(argc, argv); next_request(150);) {
        scratch();
        if (collected < MOST)
            records[collected++] = record();
        if (++request % 1200 == 0)
            while (collected > 0)
                free(records[--collected]);
    }
}
