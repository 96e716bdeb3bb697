#include <mpi.h>
#include <stdio.h>

#define TASKS 12
#define STOP 99

static int work(int n)
{
    int steps = 0;
    while (n != 1) {
        n = n % 2 ? 3 * n + 1 : n / 2;
        steps++;
    }
    return steps;
}

int main(int argc, char *argv[])
{
    int rank, size, task, answer, sum = 0;
    MPI_Status status;

    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    if (size == 1) {
        for (task = 1; task <= TASKS; task++)
            sum += work(task);
        printf("sum of steps: %d\n", sum);
    } else if (rank == 0) {
        int sent = 0, done = 0;
        for (int worker = 1; worker < size; worker++) {
            sent++;
            MPI_Send(&sent, 1, MPI_INT, worker, 1, MPI_COMM_WORLD);
        }
        while (done < TASKS) {
            MPI_Recv(&answer, 1, MPI_INT, MPI_ANY_SOURCE, 2, MPI_COMM_WORLD, &status);
            sum += answer;
            done++;
            if (sent < TASKS) {
                sent++;
                MPI_Send(&sent, 1, MPI_INT, status.MPI_SOURCE, 1, MPI_COMM_WORLD);
            } else {
                MPI_Send(&sent, 0, MPI_INT, status.MPI_SOURCE, STOP, MPI_COMM_WORLD);
            }
        }
        printf("sum of steps: %d\n", sum);
    } else {
        while (1) {
            MPI_Recv(&task, 1, MPI_INT, 0, MPI_ANY_TAG, MPI_COMM_WORLD, &status);
            if (status.MPI_TAG == STOP)
                break;
            answer = work(task);
            MPI_Send(&answer, 1, MPI_INT, 0, 2, MPI_COMM_WORLD);
        }
    }
    MPI_Finalize();
    return 0;
}
