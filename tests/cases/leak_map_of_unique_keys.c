// case: a table of all that were ever seen, by keys that do not come again
#include "case.h"

enum { BUCKETS = 4096 };

struct entry {
    struct entry *next;
    uint64_t key;
    char value[100];
};

static struct entry *table[BUCKETS];

static NOINLINE struct entry *leak_entry(uint64_t key)
{
    struct entry *entry = filled(malloc(sizeof *entry), sizeof *entry);
    entry->key = key;
    entry->next = table[key % BUCKETS];
    return table[key % BUCKETS] = entry;
}

int main(int argc, char **argv)
{
    for (begin(argc, argv); next_request(150);) {
        scratch();
        leak_entry(random_bits());
    }
}
