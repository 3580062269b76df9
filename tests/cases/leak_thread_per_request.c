// case: a thread is started for every twentieth request, and what it is told to do is not freed by it
#include "case.h"

#include <pthread.h>

static void *answer(void *argument)
{
    free(filled(malloc(100), 100));
    return argument;
}

static NOINLINE void *leak_task(void) { return filled(malloc(600), 600); }

static NOINLINE void start(pthread_attr_t *attributes)
{
    pthread_t thread;
    if (pthread_create(&thread, attributes, answer, leak_task()) == 0)
        pthread_detach(thread);
}

int main(int argc, char **argv)
{
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, 65536);
    unsigned request = 0;
    for (begin(argc, argv); next_request(200);) {
        scratch();
        if (++request % 20 == 0)
            start(&attributes);
    }
}
