// case: two sites leak by calloc and posix_memalign beside a third that frees all
#include "case.h"

static NOINLINE void leak_cleared(void)
{
    if (calloc(3, 70) == NULL)
        abort();
}

static NOINLINE void leak_aligned(void)
{
    void *block;
    if (posix_memalign(&block, 64, 256) != 0)
        abort();
}

static NOINLINE void aligned(void)
{
    void *block;
    if (posix_memalign(&block, 64, 512) != 0)
        abort();
    free(block);
}

int main(int argc, char **argv)
{
    for (begin(argc, argv); next_request(120);) {
        aligned();
        if (one_in(2))
            leak_cleared();
        if (one_in(4))
            leak_aligned();
    }
}
