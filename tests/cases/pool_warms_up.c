// case: threads make buffers of their own when they are first used, one after the other, and keep them
#include "case.h"

#include <pthread.h>
#include <stdatomic.h>

enum { WORKERS = 12 };

static atomic_int over;

static NOINLINE void *worker_buffer(void) { return filled(malloc(50000), 50000); }

static void *worker(void *argument)
{
    void *buffers[8] = {0};
    unsigned used = 0;
    while (!over) {
        if (used < 8)
            buffers[used++] = worker_buffer();
        void *work = filled(malloc(120), 120);
        free(work);
        struct timespec pause = {.tv_nsec = 50000000};
        nanosleep(&pause, NULL);
    }
    for (unsigned i = 0; i < used; i++)
        free(buffers[i]);
    return argument;
}

int main(int argc, char **argv)
{
    pthread_t threads[WORKERS];
    unsigned request = 0, started = 0;
    for (begin(argc, argv); next_request(50);) {
        scratch();
        if (++request % 50 == 0 && started < WORKERS)
            pthread_create(&threads[started++], NULL, worker, NULL);
    }
    over = 1;
    while (started > 0)
        pthread_join(threads[--started], NULL);
}
