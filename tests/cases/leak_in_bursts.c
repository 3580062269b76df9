// case: every ten seconds 200 requests fail together and leave their blocks behind
#include "case.h"

static NOINLINE void leak_request(void) { filled(malloc(150), 150); }

int main(int argc, char **argv)
{
    unsigned request = 0;
    for (begin(argc, argv); next_request(100);) {
        scratch();
        if (++request % 1000 == 0)
            for (int i = 0; i < 200; i++)
                leak_request();
    }
}
