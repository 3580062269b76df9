// case: one request in ten leaves a block behind, and there are ten times as many by day as by night
#include "case.h"

static NOINLINE void leak_block(void) { filled(malloc(400), 400); }

int main(int argc, char **argv)
{
    for (begin(argc, argv); next_request(20 + 180 * ((long)(elapsed() / 15) % 2));) {
        scratch();
        if (one_in(10))
            leak_block();
    }
}
