// case: lists of five nodes of which only the first is freed
#include "case.h"

struct node {
    struct node *next;
    char payload[40];
};

static NOINLINE struct node *leak_node(struct node *next)
{
    struct node *node = filled(malloc(sizeof *node), sizeof *node);
    node->next = next;
    return node;
}

static NOINLINE struct node *head(struct node *next)
{
    struct node *node = filled(malloc(sizeof *node), sizeof *node);
    node->next = next;
    return node;
}

int main(int argc, char **argv)
{
    for (begin(argc, argv); next_request(50);) {
        scratch();
        struct node *list = NULL;
        for (int i = 0; i < 4; i++)
            list = leak_node(list);
        free(head(list));
    }
}
