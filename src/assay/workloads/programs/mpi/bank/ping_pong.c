#include <mpi.h>
#include <stdio.h>

#define ROUNDS 10

int main(int argc, char **argv)
{
    int rank, size, ball = 0;
    int round;

    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    if (size < 2) {
        printf("nobody to play with\n");
        MPI_Finalize();
        return 0;
    }
    for (round = 0; round < ROUNDS; round++) {
        if (rank == 0) {
            ball++;
            MPI_Send(&ball, 1, MPI_INT, 1, round, MPI_COMM_WORLD);
            MPI_Recv(&ball, 1, MPI_INT, 1, round, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
        } else if (rank == 1) {
            MPI_Recv(&ball, 1, MPI_INT, 0, round, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
            ball++;
            MPI_Send(&ball, 1, MPI_INT, 0, round, MPI_COMM_WORLD);
        }
    }
    if (rank == 0)
        printf("hit %d times\n", ball);
    MPI_Finalize();
    return 0;
}
