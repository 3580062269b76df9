// case: tables are built in the first seconds, and then it works
#include "case.h"

static NOINLINE void *table(void) { return filled(malloc(2000), 2000); }

int main(int argc, char **argv)
{
    void *tables[500];
    unsigned built = 0;
    for (begin(argc, argv); next_request(100);) {
        scratch();
        if (built < 500)
            tables[built++] = table();
    }
    while (built > 0)
        free(tables[--built]);
}
