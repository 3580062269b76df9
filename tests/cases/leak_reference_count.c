// case: objects that are shared and counted; one reference in 40 is never given back
#include "case.h"

struct object {
    unsigned references;
    char data[250];
};

static NOINLINE struct object *leak_object(void)
{
    struct object *object = filled(malloc(sizeof *object), sizeof *object);
    object->references = 1;
    return object;
}

static void release(struct object *object)
{
    if (--object->references == 0)
        free(object);
}

int main(int argc, char **argv)
{
    struct object *shared[32] = {0};
    for (begin(argc, argv); next_request(100);) {
        unsigned slot = below(32);
        if (shared[slot] != NULL)
            release(shared[slot]);
        shared[slot] = leak_object();
        if (one_in(40))
            shared[slot]->references++;
    }
}
