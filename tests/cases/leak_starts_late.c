// case: nothing is leaked in the first third of the time
#include "case.h"

static NOINLINE void *leak_reply(void) { return filled(malloc(320), 320); }

int main(int argc, char **argv)
{
    for (begin(argc, argv); next_request(150);) {
        scratch();
        void *reply = leak_reply();
        if (elapsed() < case_seconds / 3 || !one_in(3))
            free(reply);
    }
}
