// case: one request in 50 fails, and its buffer is not freed then
#include "case.h"

static NOINLINE int leak_parse(void)
{
    char *buffer = filled(malloc(1500), 1500);
    if (one_in(50))
        return -1;
    free(buffer);
    return 0;
}

int main(int argc, char **argv)
{
    unsigned errors = 0;
    for (begin(argc, argv); next_request(300);) {
        scratch();
        errors += leak_parse() != 0;
    }
    return errors == 0;
}
