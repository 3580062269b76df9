// case: every request leaves a block of 200 bytes behind
#include "case.h"

static NOINLINE void leak_context(void) { filled(malloc(200), 200); }

int main(int argc, char **argv)
{
    for (begin(argc, argv); next_request(100);) {
        scratch();
        leak_context();
    }
}
