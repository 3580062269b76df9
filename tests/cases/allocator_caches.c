// case: threads that come and go, for which the C library keeps arenas, stacks and caches
#include "case.h"

#include <pthread.h>

static NOINLINE void *task_block(void)
{
    size_t size = between(16, 1000);
    return filled(malloc(size), size);
}

static void *task(void *argument)
{
    void *blocks[50];
    for (int i = 0; i < 50; i++)
        blocks[i] = task_block();
    for (int i = 0; i < 50; i++)
        free(blocks[i]);
    return argument;
}

int main(int argc, char **argv)
{
    for (begin(argc, argv); next_request(10);) {
        pthread_t threads[3];
        for (int i = 0; i < 3; i++)
            pthread_create(&threads[i], NULL, task, NULL);
        for (int i = 0; i < 3; i++)
            pthread_join(threads[i], NULL);
    }
}
