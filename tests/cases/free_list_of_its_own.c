// case: nodes that are given back go to a free list, which is asked first; at most 800 are in use
#include "case.h"

enum { MOST = 800 };

struct node {
    struct node *next;
    char data[150];
};

static struct node *in_use[MOST], *unused;

static NOINLINE struct node *node(void)
{
    struct node *node = unused;
    if (node != NULL) {
        unused = node->next;
        return node;
    }
    return filled(malloc(sizeof *node), sizeof *node);
}

int main(int argc, char **argv)
{
    for (begin(argc, argv); next_request(200);) {
        scratch();
        unsigned slot = below(MOST);
        if (in_use[slot] == NULL) {
            in_use[slot] = node();
        } else {
            in_use[slot]->next = unused;
            unused = in_use[slot];
            in_use[slot] = NULL;
        }
    }
}
