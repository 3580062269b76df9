// case: files are opened, read through and closed
#include "case.h"

static NOINLINE void look(void)
{
    FILE *file = fopen("/proc/self/status", "r");
    if (file == NULL)
        return;
    char *line = NULL;
    size_t size = 0;
    while (getline(&line, &size, file) >= 0) {
    }
    free(line);
    fclose(file);
}

int main(int argc, char **argv)
{
    for (begin(argc, argv); next_request(40);) {
        scratch();
        look();
    }
}
