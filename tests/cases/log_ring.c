// case: the last 5,000 lines of a log are kept
#include "case.h"

enum { LINES = 5000 };

static char *lines[LINES];
static unsigned next;

static NOINLINE char *line(void)
{
    char text[220];
    size_t length = between(30, 200);
    memset(text, 'l', length);
    text[length] = 0;
    return strdup(text);
}

int main(int argc, char **argv)
{
    for (begin(argc, argv); next_request(150);) {
        scratch();
        free(lines[next % LINES]);
        lines[next++ % LINES] = line();
    }
}
