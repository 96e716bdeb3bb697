#include <stdio.h>
#include <string.h>
#include <mpi.h>

int main(int argc, char *argv[])
{
    char text[128];
    int rank, size, length = 0, i;
    int counts[26] = {0}, totals[26];

    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    if (rank == 0) {
        strcpy(text, "the quick brown fox jumps over the lazy dog and runs away");
        length = strlen(text);
    }
    MPI_Bcast(&length, 1, MPI_INT, 0, MPI_COMM_WORLD);
    MPI_Bcast(text, length + 1, MPI_CHAR, 0, MPI_COMM_WORLD);
    for (i = rank; i < length; i += size)
        if (text[i] >= 'a' && text[i] <= 'z')
            counts[text[i] - 'a']++;
    MPI_Reduce(counts, totals, 26, MPI_INT, MPI_SUM, 0, MPI_COMM_WORLD);
    if (rank == 0)
        for (i = 0; i < 26; i++)
            printf("%c %d\n", 'a' + i, totals[i]);
    MPI_Finalize();
    return 0;
}
