// case: a queue whose reader pauses for five seconds of every twenty and then catches up
#include "case.h"

struct item {
    struct item *next;
    char data[240];
};

static struct item *first, **last = &first;

static NOINLINE void put(void)
{
    struct item *item = filled(malloc(sizeof *item), sizeof *item);
    item->next = NULL;
    *last = item;
    last = &item->next;
}

static void take(void)
{
    struct item *item = first;
    if (item == NULL)
        return;
    first = item->next;
    if (first == NULL)
        last = &first;
    free(item);
}

int main(int argc, char **argv)
{
    for (begin(argc, argv); next_request(150);) {
        put();
        if ((long)elapsed() % 20 >= 5)
            for (int i = 0; i < 2; i++)
                take();
    }
}
