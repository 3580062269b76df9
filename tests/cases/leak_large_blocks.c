// case: an image of some hundred kilobytes is not freed, once in two seconds
#include "case.h"

static NOINLINE void leak_image(void)
{
    size_t size = between(200000, 400000);
    filled(malloc(size), size);
}

int main(int argc, char **argv)
{
    unsigned request = 0;
    for (begin(argc, argv); next_request(100);) {
        scratch();
        if (++request % 200 == 0)
            leak_image();
    }
}
