// case: an arena of chunks that grows within a batch and is freed at its end
#include "case.h"

struct chunk {
    struct chunk *next;
    char data[8000];
};

static struct chunk *arena;

static NOINLINE void chunk(void)
{
    struct chunk *chunk = filled(malloc(sizeof *chunk), sizeof *chunk);
    chunk->next = arena;
    arena = chunk;
}

int main(int argc, char **argv)
{
    unsigned request = 0;
    for (begin(argc, argv); next_request(100);) {
        scratch();
        if (++request % 5 == 0)
            chunk();
        if (request % 700 == 0)
            while (arena != NULL) {
                struct chunk *next = arena->next;
                free(arena);
                arena = next;
            }
    }
}
