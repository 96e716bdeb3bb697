#include <stdio.h>
#include <mpi.h>

/* A number is handed down a binary tree, and a sum comes back up. */
int main(int argc, char *argv[])
{
    int rank, size, value = 0, sum, below, child;

    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    if (rank == 0)
        value = 42;
    else
        MPI_Recv(&value, 1, MPI_INT, (rank - 1) / 2, 0, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
    for (child = 2 * rank + 1; child <= 2 * rank + 2; child++)
        if (child < size)
            MPI_Send(&value, 1, MPI_INT, child, 0, MPI_COMM_WORLD);
    sum = value + rank;
    for (child = 2 * rank + 1; child <= 2 * rank + 2; child++)
        if (child < size) {
            MPI_Recv(&below, 1, MPI_INT, child, 1, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
            sum += below;
        }
    if (rank == 0)
        printf("sum %d\n", sum);
    else
        MPI_Send(&sum, 1, MPI_INT, (rank - 1) / 2, 1, MPI_COMM_WORLD);
    MPI_Finalize();
    return 0;
}
