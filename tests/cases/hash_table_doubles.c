// case: a table that doubles as it fills and is emptied at 30,000 entries
#include "case.h"

static uint64_t *slots;
static size_t capacity, used;

static NOINLINE void grow(void)
{
    size_t doubled = capacity == 0 ? 64 : capacity * 2;
    uint64_t *larger = calloc(doubled, sizeof *larger);
    if (larger == NULL)
        abort();
    for (size_t i = 0; i < capacity; i++)
        larger[i] = slots[i];
    free(slots);
    slots = larger;
    capacity = doubled;
}

int main(int argc, char **argv)
{
    for (begin(argc, argv); next_request(200);) {
        scratch();
        for (int i = 0; i < 10; i++) {
            if (used == capacity)
                grow();
            slots[used++] = random_bits();
        }
        if (used >= 30000)
            used = 0;
    }
}
