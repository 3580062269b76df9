// The plugin of the case of that name.
#include <stdlib.h>
#include <string.h>

static __attribute__((noinline)) void *leak_result(void)
{
    void *result = malloc(350);
    if (result == NULL)
        abort();
    return memset(result, 'p', 350);
}

void plugin_work(unsigned request);

void plugin_work(unsigned request)
{
    void *result = leak_result();
    if (request % 5 != 0)
        free(result);
}
