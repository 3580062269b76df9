// case: one in 1,000 of the blocks of a busy site is forgotten, of 2,000 a second
#include "case.h"

static NOINLINE void *leak_item(void) { return filled(malloc(96), 96); }

int main(int argc, char **argv)
{
    for (begin(argc, argv); next_request(200);)
        for (int i = 0; i < 10; i++) {
            void *item = leak_item();
            if (!one_in(1000))
                free(item);
        }
}
