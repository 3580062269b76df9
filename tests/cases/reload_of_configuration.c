// case: the configuration is read anew every 12 seconds, and the old one kept until the next
#include "case.h"

enum { SETTINGS = 300 };

static char *settings[2][SETTINGS];

static NOINLINE char *setting(void)
{
    char text[100];
    size_t length = between(5, 90);
    memset(text, 's', length);
    text[length] = 0;
    return strdup(text);
}

int main(int argc, char **argv)
{
    unsigned request = 0, current = 0;
    for (begin(argc, argv); next_request(100);) {
        scratch();
        if (request++ % 1200 == 0) {
            current ^= 1;
            for (int i = 0; i < SETTINGS; i++) {
                free(settings[current][i]);
                settings[current][i] = setting();
            }
        }
    }
}
