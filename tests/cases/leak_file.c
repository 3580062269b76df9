// case: a FILE is opened for every hundredth request and not closed where the file is empty
#include "case.h"

#include <sys/resource.h>

static NOINLINE void leak_look(void)
{
    FILE *file = fopen("/dev/null", "r");
    if (file == NULL)
        return;
    if (fgetc(file) == EOF)
        return;
    fclose(file);
}

int main(int argc, char **argv)
{
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    unsigned request = 0;
    for (begin(argc, argv); next_request(400);) {
        scratch();
        if (++request % 100 == 0)
            leak_look();
    }
}
