#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>

int main(int argc, char *argv[])
{
    int rank, size, i;
    int *all = NULL;
    int block[4];

    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    if (rank == 0) {
        all = (int *)malloc(4 * size * sizeof(int));
        for (i = 0; i < 4 * size; i++)
            all[i] = i;
    }
    MPI_Scatter(all, 4, MPI_INT, block, 4, MPI_INT, 0, MPI_COMM_WORLD);
    for (i = 0; i < 4; i++)
        block[i] = block[i] * block[i];
    MPI_Gather(block, 4, MPI_INT, all, 4, MPI_INT, 0, MPI_COMM_WORLD);
    if (rank == 0) {
        for (i = 0; i < 4 * size; i++)
            printf("%d\n", all[i]);
        free(all);
    }
    MPI_Finalize();
    return 0;
}
