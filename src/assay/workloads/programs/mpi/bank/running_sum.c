#include <stdio.h>
#include <mpi.h>

int main(int argc, char *argv[])
{
    int rank, value, before;

    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    value = (rank + 1) * (rank + 1);
    MPI_Scan(&value, &before, 1, MPI_INT, MPI_SUM, MPI_COMM_WORLD);
    printf("up to %d: %d\n", rank, before);
    MPI_Finalize();
    return 0;
}
