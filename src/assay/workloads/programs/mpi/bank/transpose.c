#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>

int main(int argc, char **argv)
{
    int rank, nproc, i;
    int *row, *column;

    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &nproc);
    row = malloc(nproc * sizeof(int));
    column = malloc(nproc * sizeof(int));
    for (i = 0; i < nproc; i++)
        row[i] = 10 * rank + i;
    MPI_Alltoall(row, 1, MPI_INT, column, 1, MPI_INT, MPI_COMM_WORLD);
    for (i = 0; i < nproc; i++)
        printf("column %d, row %d: %d\n", rank, i, column[i]);
    free(row);
    free(column);
    MPI_Finalize();
    return 0;
}
