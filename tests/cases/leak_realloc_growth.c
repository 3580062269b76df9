// case: a log in memory that is appended to by realloc and never cut
#include "case.h"

static char *text;
static size_t length, capacity;

static NOINLINE void leak_append(size_t size)
{
    if (length + size > capacity) {
        // By a little each time, as such code does.
        capacity = length + size + 4096;
        text = realloc(text, capacity);
        if (text == NULL)
            abort();
    }
    memset(text + length, 'y', size);
    length += size;
}

int main(int argc, char **argv)
{
    for (begin(argc, argv); next_request(200);) {
        scratch();
        leak_append(between(40, 200));
    }
}
