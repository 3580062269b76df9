// case: four threads do the same work by the same functions, and one of them forgets what it got
#include "case.h"

#include <pthread.h>
#include <stdatomic.h>

static atomic_int over;

static NOINLINE void *leak_buffer(size_t size) { return filled(malloc(size), size); }
static NOINLINE void *buffer(size_t size) { return filled(malloc(size), size); }

static void *worker(void *argument)
{
    int is_wrong = argument != NULL;
    unsigned long long state = (unsigned long long)(uintptr_t)&state;
    while (!over) {
        size_t size = 64 + (state = state * 6364136223846793005u + 1442695040888963407u, state >> 33) % 400;
        if (is_wrong)
            leak_buffer(size);
        else
            free(buffer(size));
        struct timespec pause = {.tv_nsec = 20000000};
        nanosleep(&pause, NULL);
    }
    return NULL;
}

int main(int argc, char **argv)
{
    pthread_t threads[4];
    begin(argc, argv);
    for (int i = 0; i < 4; i++)
        pthread_create(&threads[i], NULL, worker, i == 2 ? &over : NULL);
    while (next_request(50))
        scratch();
    over = 1;
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
}
