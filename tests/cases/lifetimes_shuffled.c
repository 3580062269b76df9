// case: 3,000 objects, of which any is replaced at any time
#include "case.h"

enum { OBJECTS = 3000 };

static void *objects[OBJECTS];

static NOINLINE void *object(void)
{
    size_t size = between(32, 900);
    return filled(malloc(size), size);
}

int main(int argc, char **argv)
{
    for (begin(argc, argv); next_request(250);) {
        unsigned slot = below(OBJECTS);
        free(objects[slot]);
        objects[slot] = object();
    }
}
