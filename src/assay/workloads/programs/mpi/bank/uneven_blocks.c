#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>

#define N 19

int main(int argc, char **argv)
{
    int rank, size, i, mine;
    int *counts, *starts;
    int all[N], part[N];

    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    counts = malloc(size * sizeof(int));
    starts = malloc(size * sizeof(int));
    for (i = 0; i < size; i++) {
        counts[i] = N / size + (i < N % size);
        starts[i] = i ? starts[i - 1] + counts[i - 1] : 0;
    }
    mine = counts[rank];
    for (i = 0; i < mine; i++)
        part[i] = 100 * rank + i;
    MPI_Gatherv(part, mine, MPI_INT, all, counts, starts, MPI_INT, 0, MPI_COMM_WORLD);
    if (rank == 0)
        for (i = 0; i < N; i++)
            printf("%d: %d\n", i, all[i]);
    free(counts);
    free(starts);
    MPI_Finalize();
    return 0;
}
