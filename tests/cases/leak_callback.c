// case: a callback's closure is made at every registration, and the old one is not freed when it is replaced
#include "case.h"

struct closure {
    void (*function)(struct closure *);
    char bound[72];
};

static struct closure *registered[16];

static void nothing(struct closure *closure) { closure->bound[0]++; }

static NOINLINE struct closure *leak_closure(void)
{
    struct closure *closure = filled(malloc(sizeof *closure), sizeof *closure);
    closure->function = nothing;
    return closure;
}

int main(int argc, char **argv)
{
    for (begin(argc, argv); next_request(120);) {
        scratch();
        unsigned slot = below(16);
        registered[slot] = leak_closure();
        registered[slot]->function(registered[slot]);
    }
}
