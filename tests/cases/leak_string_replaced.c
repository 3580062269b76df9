// case: a setting is copied by strdup whenever it is set, over the old one
#include "case.h"

static char *setting[8];

static NOINLINE void leak_set(unsigned which, const char *value) { setting[which] = strdup(value); }

int main(int argc, char **argv)
{
    for (begin(argc, argv); next_request(80);) {
        scratch();
        char value[128];
        memset(value, 'v', sizeof value);
        value[between(20, 120)] = 0;
        leak_set(below(8), value);
    }
}
