#include <mpi.h>
#include <stdio.h>

int main(int argc, char *argv[])
{
    int rank, size, prev, next, from_prev, from_next;
    MPI_Request reqs[4];
    MPI_Status stats[4];

    MPI_Init(&argc, &argv);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    prev = rank == 0 ? size - 1 : rank - 1;
    next = rank == size - 1 ? 0 : rank + 1;
    MPI_Irecv(&from_prev, 1, MPI_INT, prev, 1, MPI_COMM_WORLD, &reqs[0]);
    MPI_Irecv(&from_next, 1, MPI_INT, next, 2, MPI_COMM_WORLD, &reqs[1]);
    MPI_Isend(&rank, 1, MPI_INT, prev, 2, MPI_COMM_WORLD, &reqs[2]);
    MPI_Isend(&rank, 1, MPI_INT, next, 1, MPI_COMM_WORLD, &reqs[3]);
    MPI_Waitall(4, reqs, stats);
    printf("%d lies between %d and %d\n", rank, from_prev, from_next);
    MPI_Finalize();
    return 0;
}
