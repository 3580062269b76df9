// case: a plugin that is loaded after a while forgets one in five of what it makes
#include "case.h"

#include <dlfcn.h>
#include <libgen.h>
#include <limits.h>
#include <unistd.h>

// Beside the program.
static void *load(void)
{
    char path[PATH_MAX + 64];
    ssize_t length = readlink("/proc/self/exe", path, PATH_MAX);
    if (length < 0)
        abort();
    path[length] = 0;
    char *directory = dirname(path);
    memmove(path, directory, strlen(directory) + 1);
    strcat(path, "/leak_in_plugin.so");
    return dlopen(path, RTLD_NOW);
}

int main(int argc, char **argv)
{
    void (*work)(unsigned) = NULL;
    unsigned request = 0;
    for (begin(argc, argv); next_request(100);) {
        scratch();
        if (++request == 500) {
            void *plugin = load();
            if (plugin == NULL) {
                fprintf(stderr, "%s\n", dlerror());
                return 1;
            }
            *(void **)&work = dlsym(plugin, "plugin_work");
        }
        if (work != NULL)
            work(request);
    }
}
