// case: an array that is enlarged by realloc while it is filled, and filled anew when it has 20,000 elements
#include "case.h"

static uint64_t *elements;
static size_t count, capacity;

static NOINLINE void enlarge(void)
{
    capacity = capacity == 0 ? 16 : capacity + capacity / 2;
    elements = realloc(elements, capacity * sizeof *elements);
    if (elements == NULL)
        abort();
}

int main(int argc, char **argv)
{
    for (begin(argc, argv); next_request(100);) {
        scratch();
        for (int i = 0; i < 7; i++) {
            if (count == capacity)
                enlarge();
            elements[count++] = random_bits();
        }
        if (count >= 20000)
            count = 0;
    }
}
